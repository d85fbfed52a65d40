"""How anything is timed, recorded and shown."""
