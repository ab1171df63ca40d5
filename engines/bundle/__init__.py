"""What every build does around its engine: resources, stages, and a folder that appears whole."""
