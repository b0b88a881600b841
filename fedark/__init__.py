"""fedark: fine-tune a provider's model on data that nobody else may see."""

__version__ = "0.1.0"
