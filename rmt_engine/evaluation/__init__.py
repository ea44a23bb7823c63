"""Measuring what a checkpoint's memory holds."""
