"""Between the network and the application: limits, deadlines, load shedding, draining."""
