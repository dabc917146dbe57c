"""Prompts: text to token ids."""
