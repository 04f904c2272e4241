"""What a person looks at afterwards: differences, drawings, one HTML page about runs."""
