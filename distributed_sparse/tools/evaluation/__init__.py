"""evaluation: task suites that compare sparse methods with dense attention."""
