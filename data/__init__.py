"""Makers of data, never data: renderers, worlds and label makers."""
