"""The admin, with the owners of files in it."""

from django.contrib import admin
from django.urls import path

from tests.bridge.desk.models import Message

site = admin.site
if not site.is_registered(Message):
    site.register(Message)

urlpatterns = [path("admin/", site.urls)]
