"""What a user gets: the archives that a release holds, and the package as installed on a device."""
