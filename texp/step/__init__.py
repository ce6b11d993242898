"""The host side of a step in Python: groups and their scales, gathering, device state, working on θ."""
