"""What is read from a request and answered to one that is turned away."""
