"""The web middlewares and Celery tasks, each in the real framework, over replicas held behind."""
