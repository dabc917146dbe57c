"""Checkpoints opened for export: folders, single files and the hub, whatever their family."""
