"""Owns the front door of storage nodes: other machines' front ends and keepers speak to the nodes of this one."""
