"""Annotation files to records, records to training units and model input."""

from .catalog import load_records, register_all, register_ris_json

__all__ = ["load_records", "register_all", "register_ris_json"]
