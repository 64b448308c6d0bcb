"""edgetune: adapt a language model, compress it, export it, and prove what was gained and lost."""

__version__ = "0.1.0"
