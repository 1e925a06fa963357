from django.contrib import admin

from .models import Letter

admin.site.register(Letter)
