"""SALAD on Ray: teach a text LLM to listen, and measure how far speech understanding lies behind text."""

import os

if os.environ.get("SALAD_LOG") == "json":  # Ray reads both when it is imported, by the process that prints the lines
    os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")  # its prefix is coloured
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it takes lines together that differ in numbers only

__version__ = "0.1.0"
