"""Tests of training with the demon."""
