"""The result of a run as a folder for others: merged weights, or an adapter."""

from gemtune.export.folder import export_model
from gemtune.export.model_card import model_card
from gemtune.export.request import ExportRequest, export_run

__all__ = ["ExportRequest", "export_model", "export_run", "model_card"]
