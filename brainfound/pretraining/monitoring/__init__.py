"""Monitoring of a pretraining run: collapse metrics, probes, retention and the guard."""
