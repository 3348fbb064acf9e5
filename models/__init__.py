"""Transformers whose parameters know their role; one code path for every process grid."""
