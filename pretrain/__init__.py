"""rankdecay: pretraining with decoupled attention decay and live rank statistics."""

__version__ = "0.1.0"
