"""SALAD on Ray: teach a text LLM to listen, and measure how far speech understanding lies behind text."""

__version__ = "0.1.0"
