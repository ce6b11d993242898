"""Callbacks for other frameworks, each in a module that imports its framework."""
