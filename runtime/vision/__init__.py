"""Images in and boxes out: what is done to a picture before a vision engine sees it, and what answers say of it."""
