"""A page on this computer: studies are dropped, completed, looked at and downloaded."""
