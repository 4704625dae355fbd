"""What single families of vision-language models do otherwise: `model_type: x` is x.py."""
