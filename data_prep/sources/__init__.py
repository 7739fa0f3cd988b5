"""Annotation files, one module a layout: each reads a file into `data_prep.narrations.Narration`s and opens no video."""
