"""From a row to ids and labels, with the checkpoint's own chat template."""
