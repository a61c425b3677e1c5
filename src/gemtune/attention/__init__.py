"""Which token sees which, where transformers does not say it right."""

from gemtune.attention.packed import separate_documents

__all__ = ["separate_documents"]
