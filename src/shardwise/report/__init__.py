"""What a recorded run says: numbers with their sources, a page to look at, a trace for Perfetto."""
