"""Where models look: recorded, measured, drawn (``python tools/attention/main.py``)."""
