"""What breaks when things go wrong: ``python -m faults`` injects faults and counts what is lost."""
