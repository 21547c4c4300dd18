"""How `demp_fx.trace` works."""
