"""Adaptation: parameter-efficient fine-tuning and editing of weights."""
