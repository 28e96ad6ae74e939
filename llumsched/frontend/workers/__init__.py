"""Frontend processes behind one port, and the launcher that keeps them."""
