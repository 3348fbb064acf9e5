"""rankdecay: pretraining with decoupled attention decay and live rank statistics."""

from pathlib import Path

from pretrain.config.beside import bind_packages

__version__ = "0.1.0"

bind_packages(Path(__file__).resolve().parent.parent)
