"""One small program per resource: it runs in a real container, is moved, and tells whether it noticed."""
