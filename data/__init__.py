"""Makers of data, never data: a renderer, worlds and what pre-trains small encoders."""
