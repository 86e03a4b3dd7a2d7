"""What a run owes the machine: files, devices, processes. No model, no text."""
