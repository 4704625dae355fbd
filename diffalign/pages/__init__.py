"""Pages of HTML: templates that escape what they are given, and the parts of pages."""
