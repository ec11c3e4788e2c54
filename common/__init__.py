"""What all four projects share about machines: devices, ranks, files, logs. Nothing about learning."""
