"""The experiments of "Weight decay induces low-rank attention layers", one module per figure."""
