"""Pictures and cards, drawn from files: the curves of a run, contact sheets, reliability diagrams, model cards."""
