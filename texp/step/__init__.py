"""The host side of a step in Python: groups and their scales, what a step changes, and working on θ."""
