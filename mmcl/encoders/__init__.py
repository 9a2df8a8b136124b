"""Towers: one encoder per modality, all behind one interface."""
