"""gemtune: fine-tune Gemma 4.

Importing this package imports nothing else: `gemtune.patches` and `gemtune.losses` need only
torch and transformers, so that they can be used from any trainer.
"""

__version__ = "0.1.0"
