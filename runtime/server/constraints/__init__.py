"""Answers that are held to a grammar: what a schema may say, how grammars are written, compiled and kept."""
