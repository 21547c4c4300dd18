from demp_fx.traced import TracedModule, TraceNotes, assemble  # noqa: F401
