"""The site's addresses; what lies below ``async/`` does the same with async views."""

from django.contrib import admin
from django.urls import include, path
from letters import views

urlpatterns = [
    path("", views.letters, name="letters"),
    path("attachment/<path:path>", views.attachment, name="attachment"),
    path("async/", views.aletters, name="aletters"),
    path("async/attachment/<path:path>", views.aattachment, name="aattachment"),
    path("accounts/", include("django.contrib.auth.urls")),
    path("admin/", admin.site.urls),
]
