"""diffalign: preference alignment of image generators and vision-language models."""

__version__ = "0.1.0"
