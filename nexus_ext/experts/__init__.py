"""Mixtures of experts: which experts are needed, when, and what stays."""
